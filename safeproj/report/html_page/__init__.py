"""What the HTML report is made of: the document around it, its tables and its charts."""
