"""The HTML report of a run; page, pictures and style serve other reports too."""
