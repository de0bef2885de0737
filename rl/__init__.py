"""Post-training and selection of generators with the verifiers as reward. Nothing is here yet.

This package will hold the DiffusionNFT loop for flow-matching generators and best-of-N selection. It may import
`biorewards`; it takes any generator that fulfils the protocol, and imports no generator.
"""
