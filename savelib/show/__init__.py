"""What a browser shows: colours, text of models, SVG, HTML. Nothing here knows of models or runs."""
