"""What the HTML report is made of: the document around it, its tables and its charts."""

NO_PLOTLY = "plotly is not installed, which draws the html report; install safeproj[report]"
