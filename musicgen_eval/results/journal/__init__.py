"""What has been measured, on disk, window by window, so that a run which ends anywhere goes on from there.

    journal/ 000-r0.jsonl  000-r0.states      of start 0, rank 0: a header and a row a window; what is too large for a row
             000-r1.jsonl  ...                of start 0, rank 1
             001-r0.jsonl  ...                of the run that was started again

Each process appends to files of its own, a batch at a time: first the side-car (`.states`), then the rows that name its bytes, so
that a row speaks only of what is there. Rows and side-car carry checksums. A batch counts when all of its rows do, and where it was
measured again the last one counts.

`format.py` defines the rows, `writer.py` and `reader.py` the files. `results/record_store.py` uses them, and
`results/measurements.py` and `results/state_table.py` hold the records in canonical order.
"""
