"""What is measured: bytes that autograd holds, what a method needs, what a step costs."""
