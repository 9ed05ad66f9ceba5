"""What a run leaves behind: the signed bundle, JUnit XML, the HTML page and the tables of the console."""
