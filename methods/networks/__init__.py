"""Encoders and segmentation networks. Each exposes `encoder`, the part that pretraining trains and hands on."""
