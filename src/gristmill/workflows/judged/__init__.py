"""Benchmarks with a judge: MT-Bench, Arena-Hard, AlpacaEval 2, agreement with people, reward benchmarks."""
