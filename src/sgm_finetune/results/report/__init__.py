"""The report of a run, the comparison of runs, and the table and figures of a scan.

Pages (HTML):
    page                the report of one run, from `run_files` (reads its folder), its sections and the templates
    *_section           values of a section: classes, examples, checks of `sgm ship`, provenance
    comparison_page     runs side by side, on the terminal and as a page, from `comparison` (who is better, by how much)
    headlines, usage    parts of the report: metrics before and after; commands to copy
    render              a template -> one offline page

Figures on the pages (SVG; `svg` has the canvas and the colours):
    training_figures    by step: losses, learning rate, speed, memory; the losses of several runs
    grid_figures        layers x kinds: groups, signal-to-noise ratios
    histogram_figure    singular values of one matrix with the law of noise
    pool_figure         layers x directions: which layer uses which direction of a pool
    similarity_figures  how well gradients can share a basis: layers x layers, readers by layer

Numbers behind the figures:
    pictures            pictures.json
    histogram           singular values in bins, the fitted law

A scan (`sgm scan`):
    scan_table          the table on the terminal
    scan_figures        PNG files: layers x kinds, one histogram

`formats` turns numbers into text.
"""
