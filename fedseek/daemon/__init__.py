"""What both daemons are made of: processes to keep alive, what they write down, what they carry between them."""
