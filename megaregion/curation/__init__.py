"""Curation: from a folder of images to a dataset of labelled regions.

A run is a row of stages, each cut into independent pieces: propose and ocr read the images, embed keeps
the regions worth learning from, cluster finds the centers, assign labels, tokenizer learns the text's
classes, pack writes shards and publish the dataset.json that makes them a dataset. What a piece needs,
gives and was made from is in :mod:`megaregion.curation.stage`; who runs it, in
:mod:`megaregion.curation.pipeline`. Heavy dependencies have one file each: faiss kmeans.py, OpenCV's
selective search proposer.py, SAM sam.py, CLIP clip.py, EfficientNet and ONNX Runtime lite0.py, the OCR
engines rapid.py and paddle.py, sentencepiece's trainer tokenizer.py.
"""
