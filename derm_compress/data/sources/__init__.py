"""One file a kind of source; a published data set is a yaml in data/presets/, which none needs."""
