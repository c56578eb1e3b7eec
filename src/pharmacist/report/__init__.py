"""Pages: one self-contained HTML file per finished folder, readable from disk without any network."""
