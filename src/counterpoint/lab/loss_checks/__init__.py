"""Test a loss for faults that training hides; `lab.check_loss` calls this package.

- inputs.py: read the description of a batch, draw it, take the share of a process.
- given.py: import, construct and call the loss; take its gradients.
- single.py: checks in one process.
- processes.py: real processes over loopback, and W of them compared with one.
- report.py: a check and a report.
"""
