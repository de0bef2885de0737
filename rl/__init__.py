"""Post-training and selection of generators with the verifiers as reward.

Read `nft.py` first: the loss and the loop of a step. `run.py` puts steps into a folder (evaluation, state, report),
`rewards.py` turns scores into advantages, `distribution.py` is a reward for sets of images, `sentinels.py` watches what
is not rewarded, `best_of_n.py` selects. The package imports no generator: anything with the members of
`policy.FlowPolicy` (or `policy.Sampler`, for selection) will do.
"""
