"""What crosses the wire: the control service, the Arrow schemas of the data lane, and errors as status."""
