"""The atlas: plain files that show clusters, tokens and samples in any browser, without a server.

A source (a finished curation, or a synthetic one of any size) tells the labels of all regions in one pass.
From them come each cluster's members, its place on the map and its neighbours; a second pass crops the
chosen members. A browser loads none of it at once: data lies in chunks, crops in sheets, the map in tiles.
"""
