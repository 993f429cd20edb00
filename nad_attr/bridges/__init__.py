"""Sub-architectures in other libraries: Zennit, Captum's input methods, CRP, Quantus.

Nothing is imported here, for each bridge needs its own library. Take it from where it is:
``from nad_attr.bridges.zennit import SubArchitectureAttributor``.
"""
