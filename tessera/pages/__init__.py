"""Pages that join runs of several commands: any runs side by side, tokens by their experts."""
