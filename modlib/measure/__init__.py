"""What is measured: bytes that autograd holds, what a method needs, what a step costs.

Import the module that you need::

    audit    Audit, StageAudit, audit: what a method needs (also ``modlib.audit``)
    memory   SavedBytes: the bytes that autograd holds
    costs    costs: operations, thrown-away parameters, time a step
    angles   angles, errors, angles_gone, KeepStages: updates against the gradient
"""
