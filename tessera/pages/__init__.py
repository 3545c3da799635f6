"""Pages that join runs of several commands: any runs side by side, the tour, tokens by their experts."""
