"""From a position in an endless stream to a batch of images, regions and labels.

In the order of a sample's way:

order        which sample stands at which position, and the random numbers of each
shards       a dataset on disk, or several as one, read at any sample with one read
info         dataset.json: its shards, label spaces and label files
remote       a dataset that is elsewhere, as a folder whose files come and go
sample       what KEY.json says of an image: its regions and their masks
image        encoded images, opened with suspicion, and crops of them
transforms   from an image and its regions to pixels, visible patches and labels
batch        samples as tensors, in memory that passes between processes
loader       batches prepared by worker processes
writer       writes shards, their index and dataset.json
"""
