"""The memory and traffic of an offloaded step, compiled for H100s that are only described; nothing runs.

    programs       the step as it is built: Python calls one program after another, a block at a time
    one_program    the same step as one program: a loop that copies blocks between the host's memory and the device

A schedule exists for the second form only: there the compiler decides what is computed while a block is copied (`schedule`).
"""
