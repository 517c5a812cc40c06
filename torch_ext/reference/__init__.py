"""The slow, obvious versions: every formula of the library in plain torch and numpy.

``torch_ext.reference.<area>.<name>`` mirrors ``torch_ext.<area>.<name>``. Nothing here calls the compiled library;
nothing here is fast. It documents what a component computes, and the tests compare the kernels with it.
"""
