"""Where the lesion images and masks of the ISIC challenges 2016 and 2017 lie, for `data download`.

Addresses as the ISIC archive gives them (https://challenge.isic-archive.com/data). It publishes no checksums.
"""

DOWNLOADS = {
    "isic2016": (
        ("https://isic-archive.s3.amazonaws.com/challenges/2016/ISBI2016_ISIC_Part1_Training_Data.zip", None),
        ("https://isic-archive.s3.amazonaws.com/challenges/2016/ISBI2016_ISIC_Part1_Training_GroundTruth.zip", None),
        ("https://isic-archive.s3.amazonaws.com/challenges/2016/ISBI2016_ISIC_Part1_Test_Data.zip", None),
        ("https://isic-archive.s3.amazonaws.com/challenges/2016/ISBI2016_ISIC_Part1_Test_GroundTruth.zip", None),
    ),
    "isic2017": (
        ("https://isic-archive.s3.amazonaws.com/challenges/2017/ISIC-2017_Training_Data.zip", None),
        ("https://isic-archive.s3.amazonaws.com/challenges/2017/ISIC-2017_Training_Part1_GroundTruth.zip", None),
        ("https://isic-archive.s3.amazonaws.com/challenges/2017/ISIC-2017_Validation_Data.zip", None),
        ("https://isic-archive.s3.amazonaws.com/challenges/2017/ISIC-2017_Validation_Part1_GroundTruth.zip", None),
        ("https://isic-archive.s3.amazonaws.com/challenges/2017/ISIC-2017_Test_v2_Data.zip", None),
        ("https://isic-archive.s3.amazonaws.com/challenges/2017/ISIC-2017_Test_v2_Part1_GroundTruth.zip", None),
    ),
}
