"""Curation: from a folder of images or tars to a dataset of labelled regions.

    picture.py an image, regions and words in it            settings.py   every setting, by stage
    inputs/    find the images and read them                engines/      proposers, embedders, OCR
    kmeans.py  centers of embeddings.py (nearest_kernel.py) stages/       the steps, cut into pieces
    workers.py who does the pieces                          pipeline.py   which pieces are to do
    status.py  how far a run is, what it found              report.py     whether the labels are any good

A room imports from the rooms above it only. A run first lists its images. Then comes a row of stages: propose
and ocr read the images, embed keeps the regions worth learning from, cluster finds the centers, assign
labels, balance caps large clusters, tokenizer learns the text's classes, pack writes shards and publish the
dataset.json that makes them a dataset. What a piece needs, gives and was made from is in
:mod:`megaregion.curation.stages.stage`.
"""
