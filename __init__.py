"""medssl tells a researcher whether self-supervised pretraining really helped their medical segmentation.

A folder of scans goes in; every arm of a question runs with repeated pretrainings and repeated fine-tunings; a
leaderboard comes out that says what can and cannot be told apart. README.md has the tour, `cli.py` the commands.
"""

__version__ = "0.1.0"
