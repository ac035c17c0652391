"""One verb a file: the folders of earlier steps in, the files of this step out. Stages do not import each other."""
