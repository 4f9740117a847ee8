"""Test a loss for faults that training hides; `lab.check_loss` calls this package.

inputs.py      the batches: their description as a short text, ordinary and hard rows, the share of a process
given.py       the loss under test: import it, construct it, call it, take its gradients
single.py      checks in one process
processes.py   real processes over loopback, and the comparison of W of them with one
report.py      a check and a report
"""
