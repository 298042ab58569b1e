def write_page(top): pass
