"""The report's Markdown, made from results alone: the README's section, the page in docs/, and their tables."""
