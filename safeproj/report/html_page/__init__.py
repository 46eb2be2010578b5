"""What the HTML report is made of: the document around it, its tables and its charts."""

from safeproj.errors import install

NO_PLOTLY = f"plotly is not installed, which draws the html report; {install('report')}"
