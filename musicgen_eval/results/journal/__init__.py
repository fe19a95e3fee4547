"""Stores window records on disk, so that an interrupted run can be resumed after its last complete batch.

    journal/ 000-r0.jsonl    session 0, rank 0: a header, then one row per window
             000-r0.states   side file for metric states and tensors that are too large for a row
             000-r1.jsonl    session 0, rank 1
             001-r0.jsonl    session 1, after the run was resumed

Each process appends to its own files, one batch at a time. The process first writes to the side file, and then writes the rows
that refer to the new bytes of the side file. Both the rows and these bytes have checksums. A batch is complete if all of its rows
and the bytes that the rows refer to are intact. If a batch was measured several times, the last complete measurement is used.

`format.py` defines the format of the rows and the side file. `writer.py` writes the files, and `reader.py` reads them.
"""
