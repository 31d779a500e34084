"""One file a kind of photographs; a published data set is a yaml in data/presets/."""
