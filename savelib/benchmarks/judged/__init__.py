"""Benchmarks that a judge decides: AlpacaEval 2 and Arena-Hard v2.0."""
