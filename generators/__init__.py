"""Image generators behind one protocol. Nothing is here yet.

This package will hold adapters that draw treated cells from control cells with a user's own checkpoints
(CellFlux, IMPA, PhenDiff, MiT), and a pretraining script. It may import `biorewards`; never the other way round.
"""
