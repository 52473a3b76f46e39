"""pyguide for people who come from another library: its flags and functions, in terms of plans and samplers.

Modules: guided_diffusion. They are imported by name, `from pyguide.integrations import guided_diffusion`.
"""
