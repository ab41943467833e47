"""What a person looks at: the report of a run, the table and the pictures of a scan."""
