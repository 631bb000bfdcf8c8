"""Curation: from a folder of images or tars to a dataset of labelled regions.

A run first lists its images (inputs.py writes the list, source.py reads a slice of it). Then comes a row of
stages, each cut into independent pieces: propose and ocr read the images, embed keeps the regions worth
learning from, cluster finds the centers, assign labels, balance caps large clusters, tokenizer learns the
text's classes, pack writes shards and publish the dataset.json that makes them a dataset. What a piece needs,
gives and was made from is in :mod:`megaregion.curation.stage`; who runs it, in
:mod:`megaregion.curation.pipeline`: a run in one call, or shares of a stage as the jobs of a cluster. Who
holds a piece is in claim.py, how far a run is in status.py, and whether its labels are any good in quality/.

Heavy dependencies have one file each: faiss kmeans.py, OpenCV's selective search proposer.py, SAM sam.py,
CLIP clip.py, EfficientNet and ONNX Runtime lite0.py, the OCR engines rapid.py and paddle.py, sentencepiece's
trainer tokenizer.py.
"""
