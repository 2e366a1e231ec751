"""Where the ten tasks of the Decathlon lie, for `data download`.

The mirror of the Registry of Open Data on AWS (https://registry.opendata.aws/msd), with the MD5 sums that MONAI 1.6 holds its
DecathlonDataset to.
"""

DOWNLOADS = {
    "Task01_BrainTumour": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task01_BrainTumour.tar", "md5:240a19d752f0d9e9101544901065d872"),
    ),
    "Task02_Heart": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task02_Heart.tar", "md5:06ee59366e1e5124267b774dbd654057"),
    ),
    "Task03_Liver": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task03_Liver.tar", "md5:a90ec6c4aa7f6a3d087205e23d4e6397"),
    ),
    "Task04_Hippocampus": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar", "md5:9d24dba78a72977dbd1d2e110310f31b"),
    ),
    "Task05_Prostate": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task05_Prostate.tar", "md5:35138f08b1efaef89d7424d2bcc928db"),
    ),
    "Task06_Lung": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task06_Lung.tar", "md5:8afd997733c7fc0432f71255ba4e52dc"),
    ),
    "Task07_Pancreas": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task07_Pancreas.tar", "md5:4f7080cfca169fa8066d17ce6eb061e4"),
    ),
    "Task08_HepaticVessel": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task08_HepaticVessel.tar", "md5:641d79e80ec66453921d997fbf12a29c"),
    ),
    "Task09_Spleen": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task09_Spleen.tar", "md5:410d4a301da4e5b2f6f86ec3ddba524e"),
    ),
    "Task10_Colon": (
        ("https://msd-for-monai.s3-us-west-2.amazonaws.com/Task10_Colon.tar", "md5:bad7a188931dc2f6acf72b08eb6202d0"),
    ),
}
