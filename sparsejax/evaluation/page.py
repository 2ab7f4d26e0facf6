def write(*a):
  pass
