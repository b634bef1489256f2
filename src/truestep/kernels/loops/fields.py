"""The columns of the table that says what to count and update, one line or more for each parameter.

The first are those of `truestep.kernels.stepping.Table.add`, then come the fields of `Entry`.
"""

GRADIENT, PARAMETER, BUFFER, FRESH, BATCH_SIZE, WORK = range(6)
ROWS, COLUMNS, OUTPUTS, INPUTS, SAMPLES, POSITIONS = range(6, 12)
WINDOW, APART, ENTRIES, LOOKED_UP, OWNERS, BY_ENTRY, STORED, VALUES, COUNTS, KIND = range(12, 22)
FIELDS = 22
