"""Times the operators beside everything that computes the same, in one run, with the limit.

``xopd bench`` measures, ``xopd bench report`` makes tables and plots of what was measured.
"""
