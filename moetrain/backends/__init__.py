"""Optional libraries, each behind one small file. None is imported before it is asked for."""
