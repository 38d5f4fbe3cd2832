"""What is done with trained modules: read, trained on pairs, kept, exchanged, repaired."""
