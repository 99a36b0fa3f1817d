"""What each verb of the command line does: settings in, library calls, a few lines out. One module a group of verbs."""
