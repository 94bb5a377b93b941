"""The one door to names of torch that torch does not promise to keep, and to patches of torch's modules.

    _transforms   torch.func's stack of transformations and the tensors that they wrap
    _autograd     gradients by autograd's engine, and the graphs that they leave
    _foreach      operations on many tensors at once
    _modes        torch's stacks of modes, tensors without values, memory and versions of tensors
    _graphs       operators, and the recording of a function as a graph
    _operators    operators of our own
    _inductor     Inductor's compiler
    _patches      attributes of other modules that are replaced for a while, each with its reason

A new release of torch is work in this room alone. Modules of torch that take long to import are imported
inside functions, so that an eager run loads none of them.
"""
