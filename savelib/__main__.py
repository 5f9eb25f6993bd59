from savelib.cli import app

app()
