"""Pictures, folders that appear whole, the console, Markdown tables, and the files that ship."""
