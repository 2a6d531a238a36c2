"""What tests of several folders share: process groups, small runs, fault injection."""
