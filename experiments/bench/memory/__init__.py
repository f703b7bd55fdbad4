"""Memory of a generation: from shapes alone, or next to what a GPU used.

    peak      arguments + results - aliases + temporaries of one program on one device
    overhead  largest peak of a generation's programs / peak of plain batched inference of the same inputs

A generation is two programs, one after the other: the evaluation of the population, and the update, which is given the state to
reuse. Both are compiled for the target; with the targets cpu, cpux8, h100 and h100x8 no array is made and nothing runs.
"""
