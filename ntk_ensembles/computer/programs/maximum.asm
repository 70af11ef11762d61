# The larger of two numbers.
#
# input x: min/2 to max/2
# input y: min/2 to max/2
# result maximum: the larger of x and y; it replaces y

        y x -1                  # x <- x - y; negative: y is larger
        x minus                 # minus <- y - x
        minus y                 # y <- y + (x - y)
        zero end end:-1         # halt

x:      . 17
y: maximum: . -5
minus:  . 0
zero:   . 0
