"""Where bytes come from and how what is written appears; knows no model."""
